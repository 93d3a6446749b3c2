"""lm-eval itself against the server, where it is installed: MAXSTACK_LM_EVAL names its command."""

import json
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.tiny import build
from tests.serve.driven import CONFIG

LM_EVAL = os.environ.get("MAXSTACK_LM_EVAL")
QUESTIONS = [("the sky is", [" blue", " loud"]), ("cats say", [" woof", " meow, and again"])]
TASKS = {
    "scored": "output_type: multiple_choice\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]",
    "written": "output_type: generate_until\ngeneration_kwargs: {until: ['z'], max_gen_toks: 5, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]",
}


@pytest.fixture
def tasks(tmp_path):
    rows = [{"q": q, "choices": choices, "answer": 0} for q, choices in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, own in TASKS.items():
        target = "answer" if name == "scored" else '"{{choices[answer]}}"'
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
            f'test_split: test\ndoc_to_text: "{{{{q}}}}"\ndoc_to_target: {target}\ntarget_delimiter: ""\n{own}\n'
        )
    return tmp_path


def evaluated(tasks, kind: str, path: str, names: str, *more: str) -> None:
    asking = f"model=tiny,base_url={path},num_concurrent=2,max_length=256,max_retries=1"
    command = [
        str(LM_EVAL),
        "--model",
        kind,
        "--model_args",
        asking,
        "--include_path",
        str(tasks),
        "--tasks",
        names,
    ]
    command += ["--output_path", str(tasks / "out"), "--log_samples", *more]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "home")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | offline, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def samples(tasks, name: str) -> list[dict]:
    [found] = (tasks / "out").rglob(f"samples_{name}_*.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(LM_EVAL is None, reason="MAXSTACK_LM_EVAL names no lm_eval command")
def test_local_completions_scores_as_the_model_does(url, tasks):
    place = f"{url}/v1/completions,tokenizer_backend=remote"
    evaluated(tasks, "local-completions", place, "scored,written", "--batch_size", "2")
    model = build(CONFIG)
    for sample, (question, choices) in zip(samples(tasks, "scored"), QUESTIONS, strict=True):
        for choice, told in zip(choices, sample["filtered_resps"], strict=True):
            ids = [*f"{question}{choice}".encode()]
            at = np.arange(len(question) - 1, len(ids) - 1)
            wanted = jax.nn.log_softmax(model(jnp.asarray([ids]))[0])[at, np.asarray(ids)[at + 1]].sum()
            # Float32 sums over pages instead of the whole row, a few tokens.
            assert abs(float(told[0]) - float(wanted)) < 1e-3
    assert all(sample["filtered_resps"] for sample in samples(tasks, "written"))


@pytest.mark.slow
@pytest.mark.skipif(LM_EVAL is None, reason="MAXSTACK_LM_EVAL names no lm_eval command")
def test_local_chat_completions_writes(url, tasks):
    evaluated(
        tasks, "local-chat-completions", f"{url}/v1/chat/completions", "written", "--apply_chat_template"
    )
    assert len(samples(tasks, "written")) == len(QUESTIONS)
