"""The fetching child: ``python -P -m lmx.hub.download.fetch REQUEST``, one for each download.

A process of its own, because huggingface_hub blocks and checksums take a core, and because what is killed cannot leak.
It chooses (a line ``chosen``), fetches into ``models/.downloads/<key>`` and lands the model. What has come when it is
ended stays for the next try. Started by ``lmx.serving.jobs``; for its lines see ``lmx.hub.child``.
"""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError

from lmx.hub import child
from lmx.hub.child import Voice
from lmx.hub.download.choose import choose
from lmx.hub.download.hub import Patience, explain, open_hub
from lmx.hub.download.land import is_there, land
from lmx.hub.download.names import read_name
from lmx.hub.download.request import Chosen, Request, model_folder, staging_folder
from lmx.hub.download.transfer import Transfer

FILES_AT_ONCE = 8


def fetch(request: Request, voice: Voice) -> Path:
    """Raises LmxError."""
    models = Path(request.models_path)
    try:
        hub = open_hub()
        if request.chosen is not None:
            chosen = Chosen.from_json(request.chosen)
        else:
            voice.tell("asking the Hub")
            name = read_name(request.model, revision=request.revision, quantization=request.quantization)
            chosen = choose(
                hub,
                name,
                quantizations=request.quantizations,
                allow_patterns=request.allow_patterns,
                patience=Patience(request.first_wait_s, request.give_up_s / 20, voice.tell),
            )
            voice.say(chosen=chosen.as_json())
        voice.expect(chosen.total_bytes)
        folder = model_folder(models, chosen.repo)
        staging = staging_folder(models, chosen.key)
        with child.staged(staging, voice.tell):
            if is_there(folder, chosen):
                shutil.rmtree(staging, ignore_errors=True)
                voice.count(chosen.total_bytes)
                voice.tell("it was there already")
                return folder
            there = sum(path.lstat().st_size for path in staging.rglob("*") if path.is_file())
            child.check_disk(
                chosen.repo, chosen.total_bytes - there, request.low_disk_bytes, request.promised_bytes, models
            )
            _bring(chosen, staging, Patience(request.first_wait_s, request.give_up_s, voice.tell), voice)
            voice.tell("putting it into its place")
            land(staging, folder, chosen, joins=chosen.format == "gguf" or bool(request.allow_patterns))
            return folder
    except OSError as error:
        kept = "What has come is kept: ask for the model again, and the download goes on from there."
        raise child.disk_error(error, models, kept) from error


def _bring(chosen: Chosen, staging: Path, patience: Patience, voice: Voice) -> None:
    """Raises what the first file to fail did; the others are then still on their way, until the process ends."""

    def came(n: int) -> None:
        patience.succeeded()
        voice.came(n, "downloading")

    transfer = Transfer(chosen.repo, chosen.revision, staging, patience, voice.count, came)
    threads = ThreadPoolExecutor(FILES_AT_ONCE)
    # The small ones first: what a repository refuses, or lacks, shows at once.
    futures = [threads.submit(transfer.bring, file) for file in sorted(chosen.files, key=lambda file: file.size)]
    for future in as_completed(futures):
        error = future.exception()
        if error is None:
            continue
        # The client's errors are OSErrors, too.
        if isinstance(error, HfHubHTTPError) or (isinstance(error, Exception) and not isinstance(error, OSError)):
            raise explain(error, chosen.repo, chosen.revision) from error
        raise error


def main() -> None:
    child.run(lambda voice: fetch(Request.from_json(json.loads(sys.argv[1])), voice))


if __name__ == "__main__":
    main()
