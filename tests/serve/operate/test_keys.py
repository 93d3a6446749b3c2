"""Key files, and where a server may listen without one."""

import pytest

from maxstack.config import UserError
from maxstack.serve.operate.keys import keys_in
from maxstack.serve.operate.listen import check_open, is_loopback, listening, url_of

GOOD = "0123456789abcdef0123456789abcdef"


def write(folder, text: str, mode: int = 0o600):
    file = folder / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_keys_are_lines_and_comments_are_not(tmp_path):
    file = write(tmp_path, f"# ours\n\n{GOOD}\n  {GOOD}2  \n{GOOD}\n")
    assert keys_in(file, "--api-key-file") == (GOOD, GOOD + "2")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("# none\n", "holds no key"),
        ("short\n", "key 1 has 5 characters"),
        (f"{GOOD}\nzwölf{GOOD}\n", "key 2 holds"),
    ],
)
def test_what_is_no_key_is_refused_without_showing_it(tmp_path, text, part):
    with pytest.raises(UserError, match=part) as caught:
        keys_in(write(tmp_path, text), "--api-key-file")
    assert "short" not in str(caught.value)
    assert GOOD not in str(caught.value)


def test_a_file_that_others_can_read_is_warned_of_and_one_that_is_not_there_refused(tmp_path, caplog):
    assert keys_in(write(tmp_path, GOOD), "--api-key-file")
    assert not caplog.records
    assert keys_in(write(tmp_path, GOOD, 0o644), "--api-key-file")
    assert "can be read by others (mode 644)" in caplog.text
    with pytest.raises(UserError, match="No such file"):
        keys_in(tmp_path / "none", "--api-key-file")


def test_other_machines_are_answered_with_a_key_or_on_purpose():
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert is_loopback(host)
        check_open(host, (), told=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(UserError, match="--api-key-file"):
            check_open(host, (), told=False)
        check_open(host, (GOOD,), told=False)
        check_open(host, (), told=True)


def test_an_address_that_cannot_be_had_is_the_request_s_fault():
    with listening("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"--port {port}"):
            listening("127.0.0.1", port)
    with pytest.raises(UserError, match="no address"):
        listening("not a host", 0)
