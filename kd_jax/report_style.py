"""How the report of a run looks."""

from kd_jax import charts

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfa; --text: #1d2126;
  --quiet: #5c6570; --line: #d9dce0; --card: #f2f3f1; --good: #00694c;
  --bad: #a33b00; --s0: #0068a8; --s1: #c94f00; --s2: #00805e; --s3: #a8487e;
  --s4: #7a6200; --s5: #3b8fc4; --s6: #555b63; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --text: #e6e8ea;
  --quiet: #a3abb4; --line: #3a4048; --card: #1f2329; --good: #4fd0a4;
  --bad: #ff9a66; --s0: #5cb3f2; --s1: #ff9152; --s2: #44d1a5; --s3: #e59ccb;
  --s4: #e5cb4a; --s5: #a2d8f7; --s6: #b9c0c7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.1rem 4rem;
  background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .2rem 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { max-width: 44rem; margin: .5rem 0; }
.lead { font-size: 1.15rem; }
.quiet, figcaption .quiet { color: var(--quiet); font-size: .85rem;
  font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--quiet); font-size: .85rem;
  font-weight: 600; white-space: normal; min-width: 4.5rem; }
th:first-child { text-align: left; }
tbody th { font-weight: 500; }
td svg { display: block; width: 180px; }
.grid-2 { display: grid; gap: 1rem 1.6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; max-width: 30rem; }
figcaption { font-weight: 600; margin-bottom: .2rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 10.5px; fill: var(--quiet); }
.legend { list-style: none; margin: .2rem 0 0; padding: 0; font-size: .9rem; }
.legend svg { display: inline-block; width: 28px; margin-right: .3rem; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.axis { stroke: var(--quiet); stroke-width: 1; fill: none; }
.ideal { stroke: var(--text); stroke-dasharray: 4 3; fill: none; }
.dot { fill: var(--s0); fill-opacity: .6; }
.mean { stroke: var(--text); stroke-width: 2; }
.paper { fill: none; stroke: var(--s1); stroke-width: 2; }
.bar { fill: var(--s0); } .marked { fill: var(--s1); }
.claim { border-left: 4px solid var(--quiet); background: var(--card);
  padding: .6rem .9rem; margin: .7rem 0; max-width: 48rem; }
.claim.reproduced { border-color: var(--good); }
.claim.not-reproduced { border-color: var(--bad); }
.claim b { display: block; }
.square { max-width: 19rem; }
.digits { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.digit { background: var(--card); padding: .8rem; display: grid; gap: .8rem;
  grid-template-columns: 64px repeat(3, 1fr); align-items: start; }
.digit img { width: 64px; height: auto; image-rendering: pixelated; }
.probabilities { max-width: 11rem; font-size: .8rem; }
.probabilities .quiet { display: block; font-size: .75rem; line-height: 1.3; }
@media (max-width: 30rem) {
  .digit { grid-template-columns: repeat(3, 1fr); }
  .digit img { grid-column: 1 / -1; } }
pre { background: var(--card); padding: .8rem; overflow-x: auto;
  font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem;
  font-size: .95rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
""" + "".join(
  f".s{i} {{ stroke: var(--s{i}); }} .filled.s{i} {{ fill: var(--s{i}); "
  f"fill-opacity: .35; }}\n"
  for i in range(charts.COLOURS)
)
