"""The C++ part for CPUs."""

from maxstack.kernels import cpu_native


def test_it_is_built_wherever_a_compiler_is():
    """Others skip without it: code that no longer compiles would go unseen."""
    reason = cpu_native.problem() or ""
    assert not reason or reason.startswith(("no C++ compiler", "not tried on")) or reason.endswith("=0"), (
        reason
    )
