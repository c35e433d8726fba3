"""Files of other people's repositories on the Hugging Face hub, and their hashes. Knows nothing of models.

`huggingface_hub` does the downloads: it goes on where an interrupted one stopped, keeps what came in its cache, and
takes token, mirror and cache folder from its own environment (`HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maisi.errors import MaisiError
from maisi.io.files import sha256, writing


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        repo: owner and name.
        path: within it.
    """

    repo: str
    path: str


@dataclass(frozen=True)
class Listed:
    """What the hub says of a file: at which commit it lies, its bytes and its SHA-256."""

    commit: str
    size: int
    sha256: str


class Hub:
    """The hub, at one revision of every repository.

    Attributes:
        revision: branch, tag or commit.
    """

    def __init__(self, revision: str = "main", cache: Path | None = None) -> None:
        """Look for the library; nothing is asked yet. Without `cache` downloads stay where the library keeps them.

        Raises:
            MaisiError: it is not installed.
        """
        try:
            import huggingface_hub
        except ImportError:
            raise MaisiError(
                "Downloads need the package huggingface_hub; install it with: pip install 'maisi[hub]' "
                "(or download the files by other means, and name their folder with --from)."
            ) from None
        self.revision = revision
        self._library: Any = huggingface_hub
        self._cache = cache
        self._endpoint = os.environ.get("HF_ENDPOINT") or None
        self._listings: dict[str, dict[str, Listed]] = {}

    def listed(self, file: HubFile) -> Listed:
        """What the hub says of a file; each repository is asked once.

        Raises:
            MaisiError: the hub cannot be reached, does not let one in, has no such file, or tells no hash of it.
        """
        if file.repo not in self._listings:
            self._listings[file.repo] = self._listing(file.repo)
        found = self._listings[file.repo].get(file.path)
        if found is None:
            raise MaisiError(
                f"{file.repo} has no {file.path} at '{self.revision}' that the hub tells a hash of; name another "
                "--revision."
            )
        return found

    def download(self, file: HubFile) -> Path:
        """Bring a file here, or find it in the cache, and compare it with its hash.

        Raises:
            MaisiError: as `listed`, or what came is another file.
        """
        listed = self.listed(file)
        try:
            with writing(self._cache or Path(self._library.constants.HF_HUB_CACHE)):
                path = Path(
                    self._library.hf_hub_download(
                        file.repo, file.path, revision=listed.commit, cache_dir=self._cache, endpoint=self._endpoint
                    )
                )
        except MaisiError:  # the disk is full, or may not be written to
            raise
        except Exception as error:  # which ones depends on the library's version: each has another HTTP client
            raise self._fault(error, file.repo) from None
        if sha256(path) != listed.sha256:
            raise MaisiError(
                f"{path} is not what the hub says {file.path} is (its SHA-256 differs); delete it and try again."
            )
        return path

    def _listing(self, repo: str) -> dict[str, Listed]:
        try:
            info = self._library.HfApi(endpoint=self._endpoint).model_info(
                repo, revision=self.revision, files_metadata=True
            )
        except Exception as error:  # as above
            raise self._fault(error, repo) from None
        return {
            entry.rfilename: Listed(info.sha, entry.lfs.size, entry.lfs.sha256)
            for entry in info.siblings or ()
            if entry.lfs is not None
        }

    def _fault(self, error: Exception, repo: str) -> MaisiError:
        """The sentence for what the library raised."""
        errors: Any = self._library.errors
        if isinstance(error, errors.GatedRepoError):
            return MaisiError(
                f"{repo} wants its terms to be accepted: do so on its page on the hub, then log in (hf auth login)."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return MaisiError(f"The hub has no repository {repo}, or none without a token; log in (hf auth login).")
        if isinstance(error, errors.RevisionNotFoundError):
            return MaisiError(f"{repo} has no revision '{self.revision}'; name a branch, a tag or a commit of it.")
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        return MaisiError(
            f"{repo} could not be had from the hub ({reason}); try again (what came is kept), or name a folder that "
            "has the files with --from."
        )
