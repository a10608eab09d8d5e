from __future__ import annotations

from pathlib import Path

from nas_kd.files.digests import digest_of, sha256_of

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180-4


def test_a_digest_is_the_beginning_of_the_sha256() -> None:
    assert digest_of("abc") == ABC[:16]
    assert digest_of(b"abc", 64) == ABC


def test_of_a_file_the_first_bytes_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"xxabc")
    assert sha256_of(tmp_path / "file", skip=2) == ABC
