"""The Hugging Face Hub as `push` uses it: a repository of a model, a folder that is uploaded into it, and what its errors mean."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from finetune.runtime.errors import UserError

MAIN = "main"
_HTTP_LIBRARIES = ("httpx", "httpx2")  # by which huggingface_hub speaks, depending on its release
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN; --offline-folder OUT writes the folder without the Hub"
_ONCE_MORE = "the same command goes on: what has arrived is not sent again"


class HubPush(NamedTuple):
    """What a push did: the commit's address, and whether it is a new one. Nothing is committed if all was there already."""

    url: str
    is_new: bool
    is_private: bool


def is_offline() -> bool:
    """Whether the environment keeps this process off the Hub (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def check_name(repo: str, where: str) -> None:
    """Raise UserError, with a place, unless the Hub could have a repository of this name."""
    try:
        validate_repo_id(repo)
        is_name = repo.isascii() and all(part[0].isalnum() and part[-1] not in "-." for part in repo.split("/"))
    except HFValidationError:
        is_name = False
    if not is_name:
        cure = "write it like you/surfing-ltx: letters, digits, -, _ and ., at most 96, and none of - and . twice or at an end"
        raise UserError("not the name of a repository", cure, where)


def full_name(repo: str) -> str:
    """A repository's id with its owner: the token's user if none is named.

    Raises:
        UserError: there is no token, it is not accepted, or the Hub cannot be reached.
    """
    if not get_token():
        raise UserError("there is no token of the Hugging Face Hub on this machine", _LOG_IN, "push")
    if "/" in repo:
        return repo
    with _explained(repo):
        return f"{HfApi().whoami()['name']}/{repo}"


def push_folder(folder: Path, repo: str, is_public: bool, revision: str, message: str) -> HubPush:
    """Upload a folder's files, those alone that the repository does not have as they are. The repository is made if there is none.

    Args:
        repo: its id, with the owner.
        is_public: whether all may see it. One that all see already is only pushed to if this is so.
        revision: a branch, which is made if there is none.
        message: of the commit.
    Raises:
        UserError: what the Hub refuses, or that it cannot be reached.
    """
    api = HfApi()
    with _explained(repo):
        api.create_repo(repo, private=not is_public, exist_ok=True)
        is_private = bool(api.repo_info(repo).private)
    if not is_private and not is_public:
        cure = "add --public if all may see these files, or make it private in its settings on the Hub"
        raise UserError("this repository is public", cure, repo)
    with _explained(repo):
        if revision != MAIN:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.repo_info(repo, revision=revision).sha
        commit = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    return HubPush(commit.commit_url, commit.oid != before, is_private)


def command_for_later(folder: Path, repo: str, is_public: bool, revision: str, message: str) -> str:
    """The command that uploads a folder that was written offline."""
    words = ["hf", "upload", repo, str(folder), ".", "--no-private" if is_public else "--private"]
    words += ["--revision", revision] if revision != MAIN else []
    return shlex.join([*words, "--commit-message", message])


def card_of(repo: str, revision: str) -> dict[str, object]:
    """What the card of a model on the Hub says at its head; nothing if it cannot be had: it is only wanted for the licence."""
    try:
        data = HfApi().model_info(repo, revision=revision).card_data
    except Exception:  # gated, gone, no network, a damaged card: the licence is then not known
        return {}
    return data.to_dict() if data else {}


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into a UserError of one line."""
    try:
        yield
    except Exception as error:
        if told := _explanation(error, repo):
            raise told from error
        raise


def _explanation(error: BaseException, repo: str) -> UserError | None:
    """What an error means for the user; None if it has nothing to do with the Hub."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for each in chain:
        if isinstance(each, LocalTokenNotFoundError):
            return UserError("there is no token of the Hugging Face Hub on this machine", _LOG_IN, repo)
        if isinstance(each, HfHubHTTPError) and each.response is not None:
            return _refusal(each, repo)
    for each in chain:
        if type(each).__module__.partition(".")[0] in _HTTP_LIBRARIES or isinstance(
            each, ConnectionError | TimeoutError
        ):
            cure = f"look at the network; {_ONCE_MORE}. --offline-folder OUT writes the folder without the Hub"
            return UserError(f"the Hugging Face Hub cannot be reached ({_reason(each)})", cure, repo)
    if isinstance(error, RuntimeError):  # so the client says that a file was not sent, whatever the reason
        return UserError(f"the upload has failed ({_reason(chain[-1])})", f"look at the network; {_ONCE_MORE}", repo)
    if isinstance(error, ValueError):  # of a repository's name, or what the Hub says of the card
        return UserError(f"the Hub does not take this ({_reason(error)})", "mend --repo, or what the line names", repo)
    return None


def _refusal(error: HfHubHTTPError, repo: str) -> UserError:
    """What an answer of the Hub means."""
    status = error.response.status_code
    said = error.server_message.strip().splitlines() if error.server_message else []
    reason = f"{status}: {said[0]}" if said else str(status)
    if status == 401:
        what = f"the Hub does not accept the token ({reason})"
        return UserError(what, "log in again with `hf auth login`, with a token that may write", repo)
    if status == 403:
        cure = "name a repository of your own, --repo YOU/NAME, or log in with a token that may write there"
        return UserError(f"this token may not write to the repository ({reason})", cure, repo)
    if status == 404:
        cure = "look at the spelling of owner, name and --revision; a private repository needs a token that may see it"
        return UserError(f"the Hub knows no such repository or branch ({reason})", cure, repo)
    if status in (409, 412):
        return UserError(f"somebody else has pushed at the same time ({reason})", _ONCE_MORE, repo)
    if status == 429 or status >= 500:
        return UserError(f"the Hub has failed ({reason})", f"try again later; {_ONCE_MORE}", repo)
    return UserError(f"the Hub refuses this ({reason})", "mend what the Hub names", repo)


def _reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
