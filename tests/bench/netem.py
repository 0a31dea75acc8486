from tests.bench.table import SkippedRow


def netem(ground):
    raise SkippedRow("not yet")
