"""A run of several trainings, each resumable in a folder of its own."""

import pathlib

from kd_jax.train.workdir import read_metrics


class Stages:
  """Names the stages of a run and counts them for the progress bar.

  Attributes:
    directory: the run's directory.
    total: how many stages there will be.
  """

  def __init__(self, directory: pathlib.Path, total: int):
    self.directory, self.total = directory, total
    self._titles: dict[str, str] = {}

  def enter(self, name: str, title: str) -> tuple[pathlib.Path, str]:
    """A stage: its directory, and what the progress bar says.

    Args:
      name: path of the stage below the run's directory.
      title: for people.

    Returns:
      (directory, "[2/9] title").
    """
    self._titles[name] = title
    return self.directory / name, f"[{len(self._titles)}/{self.total}] {title}"

  def curves(
    self, key: str, *, prefix: str | tuple[str, ...] = ""
  ) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The learning curves of all stages, as `report.write` takes them.

    Args:
      key: the name of the number in `metrics.jsonl`.
      prefix: only stages whose name begins so, or with one of these.

    Returns:
      {key: {title: {"step": [...], "value": [...]}}}, stages without that
      number left out.
    """
    series = {}
    for name, title in self._titles.items():
      path = self.directory / name / "metrics.jsonl"
      rows = [row for row in read_metrics(path) if key in row]
      if name.startswith(prefix) and rows:
        series[title] = {
          "step": [row["step"] for row in rows],
          "value": [row[key] for row in rows],
        }
    return {key: series} if series else {}
