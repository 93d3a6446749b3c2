"""The frame of the command line: verbs, exit codes, messages."""

import errno
import importlib
import subprocess
import sys
import types

import pytest

from maxstack import cli
from maxstack.config import RunError, UserError, log_faults_in


@pytest.fixture
def verb(monkeypatch):
    """Installs a verb `try` that does what the test says."""

    def install(action) -> None:
        module = types.ModuleType("maxstack_test_verb")
        module.main = action
        monkeypatch.setitem(sys.modules, "maxstack_test_verb", module)
        monkeypatch.setitem(cli.VERBS, "try", cli.Verb("maxstack_test_verb", "a test"))

    return install


@pytest.fixture(autouse=True)
def _no_fault_folder(tmp_path):
    log_faults_in(tmp_path / "absent")


def raising(error: BaseException):
    def action(argv):
        raise error

    return action


def test_the_verb_gets_its_words_and_gives_the_exit_code(verb):
    seen = []
    verb(lambda argv: seen.append(argv) or 7)
    assert cli.main(["try", "x", "--debug"]) == 7
    assert seen == [["x", "--debug"]]


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, entry in cli.VERBS.items():
        assert name in text
        assert entry.help in text


def test_no_verb_at_all_is_a_wrong_request(capsys):
    assert cli.main([]) == 2
    assert "usage: maxstack" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("maxstack 0.")


@pytest.mark.parametrize(
    ("nodes", "environment", "wanted"),
    [
        ((), {}, "cpu"),
        (("/dev/null",), {}, None),
        ((), {"TPU_WORKER_ID": "0"}, None),
        ((), {"JAX_PLATFORMS": "tpu,cpu"}, "tpu,cpu"),
    ],
)
def test_a_tpu_is_looked_for_unless_only_its_compiler_is_here(monkeypatch, nodes, environment, wanted):
    monkeypatch.setattr(cli, "_DEVICE_NODES", nodes)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cli.os, "environ", dict(environment))
    assert cli.main(["trian"]) == 2
    assert cli.os.environ.get("JAX_PLATFORMS") == wanted


def test_an_unknown_verb_is_answered_with_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "unknown verb 'trian'; did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_a_module_with_main(name):
    assert callable(importlib.import_module(cli.VERBS[name].module).main)


class JaxRuntimeError(RuntimeError):
    """Stands for jax.errors.JaxRuntimeError, which goes by its name."""


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (UserError("heads 3: use 4"), 2, ["heads 3: use 4"]),
        (RunError("checkpoint 4 is damaged"), 1, ["checkpoint 4 is damaged"]),
        (MemoryError(), 1, ["out of memory on the host", "--micro-batches"]),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GB\nat secret"),
            1,
            ["out of device memory", "3 GB", "--micro-batches"],
        ),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), 1, ["/x/y", "the disk is full", "another folder"]),
        (PermissionError(errno.EACCES, "denied", "/x/y"), 1, ["/x/y", "no permission"]),
    ],
)
def test_a_foreseen_fault_is_a_message_without_traceback(verb, capsys, error, code, parts):
    verb(raising(error))
    assert cli.main(["try"]) == code
    text = capsys.readouterr().err
    assert text.startswith("maxstack try: error: ")
    assert "Traceback" not in text
    assert "secret" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("x"), JaxRuntimeError("INTERNAL: x"), OSError("x")]
)
def test_an_unforeseen_error_keeps_its_traceback(verb, error):
    verb(raising(error))
    with pytest.raises(type(error)):
        cli.main(["try"])


def test_the_name_of_the_device_error_is_still_that():
    import jax.errors

    assert jax.errors.JaxRuntimeError.__name__ == "JaxRuntimeError"


def test_the_traceback_goes_to_the_log_of_the_run(verb, capsys, tmp_path):
    verb(raising(UserError("wrong")))
    assert cli.main(["try", "--out", str(tmp_path)]) == 2
    assert "Traceback" in (tmp_path / "error.log").read_text()
    assert f"the traceback is in {tmp_path}" in capsys.readouterr().err
    known = tmp_path / "known"
    known.mkdir()
    log_faults_in(known)
    assert cli.main(["try"]) == 2
    assert "UserError: wrong" in (known / "error.log").read_text()


def test_debug_shows_the_traceback(verb, capsys):
    verb(raising(UserError("wrong")))
    assert cli.main(["--debug", "try"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "\nmaxstack try: stopped\n"


def test_a_reader_that_leaves_is_no_traceback():
    code = (
        "import sys, types; from maxstack import cli\n"
        "module = types.ModuleType('v'); sys.modules['v'] = module\n"
        "def main(argv):\n    while True: print('y' * 1000)\n"
        "module.main = main; cli.VERBS['v'] = cli.Verb('v', ''); sys.exit(cli.main(['v']))\n"
    )
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" | head -n 1', sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "y" * 1000 + "\n"
    assert done.stderr == ""


def test_a_module_of_the_user_s_is_imported_before_the_verb_runs(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "layers_of_mine.py").write_text("came = True\n")
    verb(lambda argv: 0 if sys.modules["layers_of_mine"].came else 1)
    assert cli.main(["--debug", "--import", "layers_of_mine", "try"]) == 0
    assert cli.main(["--import", "layers_of_nobody", "try"]) == 2
    assert "--import layers_of_nobody: Python finds no module layers_of_nobody" in capsys.readouterr().err
