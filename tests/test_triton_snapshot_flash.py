"""The half of test_triton_snapshot.py that takes the longest, in a file of its own: files run side by side."""

from aot_cases import differences, flash_attentions


def test_sm_90_becomes_what_was_committed():
    found = differences("sm_90", flash_attentions)
    assert not found, "\n".join(found)
