"""A template that wants too much is stopped within seconds, in bounded memory, and leaves nothing running."""

import json
import subprocess
import sys
import threading
import time

import pytest

from maxstack.config import UserError
from maxstack.data.chat.budget import MOST_TEMPLATE, MOST_TEXT
from maxstack.data.chat.template import ChatTemplate
from tests.data.chat.goldens import renderer

GROW = "{% for i in range(100) %}GROW{% endfor %}{{ ns.x | length }}"
SEED = "{% set ns = namespace(x='aaaaaaaaaa') %}"
LARGE = "{% set x = 'a' * 1000000 %}"

STOPPED = {
    "a range": "{% for i in range(10**12) %}x{% endfor %}",
    "a reversed range": "{% for i in range(10**12, 0, -1) %}x{% endfor %}",
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "nested generation": "{% for i in range(100000) %}{% generation %}{% for j in range(100000) %}{% endfor %}"
    "{% endgeneration %}{% endfor %}",
    "a product": "{{ 'a' * 10**10 }}",
    "a product of variables": "{% set n = 10**10 %}{% set a = n * 'a' %}",
    "a list": "{{ ([1] * 10**10) | length }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a long number": "{% set ns = namespace(x=10**60) %}"
    "{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling": SEED + GROW.replace("GROW", "{% set ns.x = ns.x + ns.x %}"),
    "doubling with ~": SEED + GROW.replace("GROW", "{% set ns.x = ns.x ~ ns.x %}"),
    "replacing": SEED + GROW.replace("GROW", "{% set ns.x = ns.x.replace('a', ns.x) %}"),
    "the filter replace": SEED + GROW.replace("GROW", "{% set ns.x = ns.x | replace('a', ns.x) %}"),
    "replacing nothing": SEED + GROW.replace("GROW", "{% set ns.x = ns.x.replace('', ns.x) %}"),
    "lists of lists": "{% set ns = namespace(x=[1]) %}" + GROW.replace("GROW", "{% set ns.x = [ns.x, ns.x] %}"),
    "objects as JSON": "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}"
    "{% endfor %}{{ ns.x | tojson }}",
    "center": "{{ 'a'.center(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(10**8) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "a format with a width given": "{{ '{:{}}'.format(1, 10**10) }}",
    "%": "{{ '%10000000000d' % 1 }}",
    "% with a width given": "{{ '%*d' % (10**10, 1) }}",
    "the filter format": "{{ '%10000000000d' | format(1) }}",
    "join": LARGE + "{{ x.join(x) }}",
    "the filter join": LARGE + "{{ range(200000) | join(x) }}",
    "JSON with an indent": "{{ [1] | tojson(indent=10**10) }}",
    "the date": "{{ strftime_now('%99999999d') }}",
    "bytes of a number": "{{ (5).to_bytes(10**10) }}",
    "bytes of a text": "{{ 'a'.encode().center(10**10) }}",
    "output": LARGE + "{% for i in range(100000) %}{{ x }}{% endfor %}",
    "captured output": LARGE + "{% set y %}{% for i in range(100000) %}{{ x }}{% endfor %}{% endset %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a loop in itself": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "many variables": LARGE + "".join(f"{{% set v{i} = x + '{i}' %}}" for i in range(1000)),
    "comparing": "{% set x = 'a' * 4000000 %}{% for i in range(100000) %}{{ x in x }}{% endfor %}",
    "slices": "{% set x = range(200000) | list %}{% for i in range(100000) %}{% set y = x[1:] %}{% endfor %}",
    "the filter map": "{{ range(200000) | map('string') | map('upper') | list | length }}" * 50,
    "escapes": "{% set x = '<' * 4000000 %}{{ x | e | e }}",
}  # fmt: skip


@pytest.mark.parametrize("name", STOPPED)
def test_it_is_stopped_within_seconds(name):
    began, threads = time.monotonic(), threading.active_count()
    with pytest.raises(UserError, match="was stopped"):
        ChatTemplate(STOPPED[name]).render({"messages": []})
    assert time.monotonic() - began < 30  # 2 s of processor time by design; machines may be busy
    assert threading.active_count() == threads


def test_all_of_them_stay_within_a_gigabyte():
    probe = """
import json, resource, sys
sys.path.insert(0, ".")
from maxstack.data.chat.template import ChatTemplate
from maxstack.config import UserError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
stopped = 0
for source in json.load(sys.stdin):
    try:
        ChatTemplate(source).render({"messages": []})
    except UserError as error:
        stopped += "was stopped" in str(error)
# Not getrusage: its peak counts what the process was before it became this program, a copy of the tests' own.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(stopped, int(peak.split()[1]) >> 10)
"""
    slow = (
        "nested loops",
        "nested generation",
        "lists of lists",
        "slices",
        "a macro that calls itself twice",
    )
    sources = [source for name, source in STOPPED.items() if name not in slow]
    done = subprocess.run(
        [sys.executable, "-c", probe], input=json.dumps(sources), capture_output=True, text=True, check=True
    )
    stopped, megabytes = map(int, done.stdout.split())
    assert stopped == len(sources)
    assert megabytes < 1024


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(_x=1) %}",
        "{% include 'file' %}",
        "{% import 'file' as f %}",
        "{% extends 'file' %}",
        "{{ lipsum(n=10**9) }}",
        "{{ 'x' | urlize }}",
        "{{ 1 / 0 }}",
        "{{ " + "9" * 10000 + " }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{% for i in range(9) %}" * 40 + "{% endfor %}" * 40,
        "{{ 1" + " + 1" * 20000 + " }}",
        "{% break %}",
        "{{ cycler('a') }}",
    ],
)
def test_what_is_no_chat_template_is_a_clear_error(source):
    with pytest.raises(UserError, match="the chat template"):
        ChatTemplate(source).render({"messages": []})


def test_a_template_of_100_mb_is_refused_at_once():
    source = "x" * 100_000_000
    began = time.monotonic()
    with pytest.raises(UserError, match="100,000,000 characters"):
        ChatTemplate(source)
    assert time.monotonic() - began < 0.5
    assert len(ChatTemplate("x" * MOST_TEMPLATE).render({"messages": []})) == MOST_TEMPLATE


def test_the_longest_conversation_is_far_from_the_caps_and_a_longer_one_is_refused():
    half = [
        {"role": "user", "content": "word " * 4000},
        {"role": "assistant", "content": "word " * 4000},
    ] * 50
    text = renderer("qwen3")(half, add_generation_prompt=True).text
    assert len(text) > MOST_TEXT * 0.4
    with pytest.raises(UserError, match="characters"):
        renderer("chatml")([{"role": "user", "content": "a" * (MOST_TEXT + 1)}])


def test_a_stopped_template_leaves_no_budget_behind():
    with pytest.raises(UserError, match="was stopped"):
        ChatTemplate(STOPPED["doubling"]).render({"messages": []})
    assert ChatTemplate("{{ 'a' * 1000 }}").render({"messages": []}) == "a" * 1000
