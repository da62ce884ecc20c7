"""No secret of a URL is written down or told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megassm.config.load import dump_config, load_config
from megassm.config.schema import Config
from megassm.config.source import ConfigError
from megassm.errors import UserError, redacted, scheme_of, without_secrets
from tests.conftest import ROOT

URL = "https://me:pa55@host.org:81/a/b?X-Amz-Signature=s3cr3t&y=1#s3cr3t"


def test_a_url_loses_what_is_secret_and_a_path_nothing() -> None:
    assert without_secrets(URL) == "https://host.org:81/a/b"
    for path in ("data/x?y", "/a@b/c#d", "s3://bucket/a/b", "odd name: x"):
        assert without_secrets(path) == path
    assert [scheme_of(place) for place in (URL, "S3://b/x", "a/b", "/x")] == ["https", "s3", "", ""]


def test_messages_keep_what_is_around_a_url() -> None:
    assert redacted(f"{URL}: denied") == "https://host.org:81/a/b?...: denied"
    assert redacted(f"path = '{URL}', (see {URL}).") == (
        "path = 'https://host.org:81/a/b?...', (see https://host.org:81/a/b?...)."
    )
    assert redacted("s3://bucket/a: no a?b here") == "s3://bucket/a: no a?b here"
    assert "s3cr3t" not in str(UserError(f"cannot read {URL}"))


@given(st.text(alphabet="XYZ019%&=+/-_~@:;,", max_size=60), st.text(alphabet="XYZ019%-_~", max_size=60))
def test_no_query_and_no_password_survives(query: str, password: str) -> None:
    query, password = f"Q{query}Q", f"Q{password}Q"
    for text in (f"https://host/x?sig={query}", f"see <s3://u:{password}@b/o?{query}> and 'gs://b/o?k={query}', so"):
        assert "Q" not in redacted(text)


@pytest.mark.parametrize(
    "overrides",
    [
        (f"data.path={URL}",),
        ("data.path=null", f"data.sources={{a: '{URL}'}}", "data.phases=[{start_step: 0, sources: {a: 1}}]"),
    ],
)
def test_what_is_written_down_holds_no_secret(
    small_config: Callable[..., Config], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = small_config(*overrides)
    assert "s3cr3t" in (config.data.path or config.data.sources["a"])
    for written in (dump_config(config), config.model_dump_json(), str(config.model_dump())):
        assert "https://host.org:81/a/b" in written
        assert "s3cr3t" not in written
        assert "pa55" not in written
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml").run == config.run


@pytest.mark.parametrize("override", [f"data.pth={URL}", f"data.cache_gib={URL}", f"data.sources={{a: '{URL}'}}"])
def test_mistakes_of_a_configuration_hold_no_secret(override: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_config(ROOT / "configs/tiny.yaml", [override])
    assert "s3cr3t" not in str(told.value)
    assert "pa55" not in str(told.value)
