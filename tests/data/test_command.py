import dataclasses

import pytest

from maxstack.config import UserError
from maxstack.data.command import main
from maxstack.data.store import PreparedSource


@pytest.fixture
def recipe(corpus, tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(
        "from maxstack.data import DataConfig, SourceConfig, TokenizerConfig\n\n\n"
        "def config():\n"
        f"    source = SourceConfig(name='plays', path={str(corpus)!r})\n"
        "    tokenizer = TokenizerConfig(vocab_size=300)\n"
        f"    return DataConfig(sources=(source,), tokenizer=tokenizer, cache={str(tmp_path / 'cache')!r})\n"
    )
    return file


def test_prepare_writes_folders_that_can_be_shown_and_checked(recipe, tmp_path, capsys):
    assert (
        main(["prepare", str(recipe), "--out", str(tmp_path / "out"), "--tokenizer.vocab-size", "280"]) == 0
    )
    assert "280 tokens" in capsys.readouterr().out
    folder = tmp_path / "out" / "plays"
    assert PreparedSource(folder).tokenizer.vocab_size == 280
    assert main(["show", str(folder)]) == 0
    assert main(["verify", str(folder)]) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    tokens = folder / "train.tokens.000.bin"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    with pytest.raises(UserError, match="damaged"):
        main(["verify", str(folder)])


def test_prepare_without_a_folder_fills_the_cache(recipe, tmp_path, capsys):
    assert main(["prepare", str(recipe)]) == 0
    [folder] = (p for p in (tmp_path / "cache" / "prepared").iterdir() if not p.name.startswith("."))
    assert str(folder) in capsys.readouterr().out


def test_a_run_is_prepared_by_its_data(recipe, tmp_path, capsys):
    recipe.write_text(
        recipe.read_text().replace("    return DataConfig", "    data = DataConfig")
        + "    return Run(data=data)\n\n\n@dataclass(frozen=True, kw_only=True)\nclass Run:\n    data: DataConfig\n"
    )
    recipe.write_text("from dataclasses import dataclass\n" + recipe.read_text())
    assert main(["prepare", str(recipe), "--data.sources.0.held-out-fraction", "0.5"]) == 0
    assert "plays" in capsys.readouterr().out


def test_what_cannot_be_prepared_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"vocab[-_]siz"):
        main(["prepare", str(recipe), "--tokenizer.vocab-siz", "280"])
    recipe.write_text(
        "import dataclasses\n\n\n@dataclasses.dataclass\nclass C:\n    x: int = 1\n\n\nconfig = lambda: C()\n"
    )
    with pytest.raises(UserError, match="neither a DataConfig nor a run with data"):
        main(["prepare", str(recipe)])
    with pytest.raises(UserError, match=r"no meta.json"):
        main(["show", str(tmp_path)])
    with pytest.raises(UserError, match="unknown words --x"):
        main(["corpora", "--x"])


def test_corpora_are_listed_with_their_licence(capsys):
    assert main(["corpora"]) == 0
    assert "corpus:shakespeare  5.1 MB in 42 files, texts in the public domain" in capsys.readouterr().out


def test_progress_is_logged_once_a_stage_where_there_is_no_terminal(config, tmp_path, caplog):
    from maxstack.data.prepare import prepare
    from maxstack.data.progress import shown

    with caplog.at_level("INFO", "maxstack.data.progress"), shown() as report:
        prepare(dataclasses.replace(config, cache=str(tmp_path)), report)
    stages = [record.getMessage() for record in caplog.records if record.name == "maxstack.data.progress"]
    assert stages == ["read plays", "read poems", "train tokenizer ", "tokenise plays", "tokenise poems"]
