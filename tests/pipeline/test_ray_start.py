"""Starting Ray where its default places cannot be written."""

import pytest

from pipeline.ray_start import local_token


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_a_token_is_made_only_where_ray_cannot_keep_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_token() == {}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    tokens = [local_token()["RAY_AUTH_TOKEN"] for _ in range(2)]
    assert tokens[0] != tokens[1]
    assert len(tokens[0]) >= 32
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert local_token() == {}
