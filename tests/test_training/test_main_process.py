"""Which process prints: the only one, or the one the loop's ranks name."""

from types import SimpleNamespace

from llmtune.training.main_process import is_main


def test_the_only_process_is_the_main_one():
    assert is_main(SimpleNamespace())
    assert is_main(SimpleNamespace(ranks=SimpleNamespace(main=True)))
    assert not is_main(SimpleNamespace(ranks=SimpleNamespace(main=False)))
