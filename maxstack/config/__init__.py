"""Run files, typed overrides on the command line, and configurations as text.

A configuration is a tree of frozen, keyword-only dataclasses. Each field is followed by a docstring (meaning and unit),
which `--help` shows. A run file is Python with one function `config()`; a variant of another run is

    def config():
        base = load_run(Path(__file__).with_name("tiny.py"))
        return replace(base, steps=2000)
"""

from maxstack.config.errors import RunError, UserError, fault_folder, log_faults_in
from maxstack.config.fields import type_name, undocumented, wrong_types
from maxstack.config.files import cannot_write, result_folder, write_atomically
from maxstack.config.overrides import override
from maxstack.config.plain import from_dict, from_json, register, to_dict, to_json
from maxstack.config.run_file import load_run, run_text, write_run

__all__ = [
    "RunError",
    "UserError",
    "cannot_write",
    "fault_folder",
    "from_dict",
    "from_json",
    "load_run",
    "log_faults_in",
    "override",
    "register",
    "result_folder",
    "run_text",
    "to_dict",
    "to_json",
    "type_name",
    "undocumented",
    "write_atomically",
    "write_run",
    "wrong_types",
]
