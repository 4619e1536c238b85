"""What takes long and nobody need wait for: downloads and conversions, as jobs that survive the server.

Thin over ``lmx.serving.jobs``. Whoever follows a job and goes away leaves it running; DELETE ends it.
"""

from typing import Annotated, Any

from pydantic import Field
from quart import Blueprint, Response
from quart_schema import document_request, document_response

from lmx.api.admin.bodies import AdminRequest, Name, receive
from lmx.api.admin.description import Descriptions
from lmx.api.admin.progress import followed
from lmx.api.admin.queries import switch
from lmx.config.live import Live
from lmx.errors import InvalidRequest, ModelInvalid
from lmx.serving.jobs import ConvertWanted, DownloadWanted, Job, JobNotFound, Jobs

Word = Annotated[str, Field(max_length=255)]


class DownloadRequest(AdminRequest):
    model: Annotated[
        str,
        Field(
            min_length=1,
            max_length=500,
            description="A repository of the Hub, also with `@revision` or `:QUANTISATION` behind it; or a name to "
            "look for.",
        ),
    ]
    revision: Word | None = Field(None, description="Branch, tag or commit.")
    quantization: Word | None = Field(None, description="Left out: MLX weights first, then [hub] quantizations.")
    allow_patterns: Annotated[list[Word], Field(fail_fast=True, max_length=100)] | None = Field(
        None, description="Only files whose path matches one of them, such as `*.safetensors`."
    )
    stream: bool | None = Field(None, description="Server-sent events: the job, at each change, until it is over.")


class ConvertRequest(AdminRequest):
    model: Name
    bits: int | None = Field(None, ge=0, le=16, description="4 by default; 0 with a dtype: not quantised.")
    group_size: int | None = Field(None, ge=1, le=1024)
    mode: Word | None = Field(None, description="affine, mxfp4, nvfp4 or mxfp8.")
    dtype: Word | None = Field(None, description="float16, bfloat16 or float32, of what is not quantised.")
    name: Annotated[str, Field(min_length=1, max_length=255)] | None = Field(None, description="Of the new model.")
    stream: bool | None = Field(None, description="As for a download.")


def blueprint(jobs: Jobs, descriptions: Descriptions, live: Live) -> Blueprint:
    """The routes over ``jobs``."""
    routes = Blueprint("admin_jobs", __name__)

    def follow(job: Job) -> Response:
        return followed(jobs.watch(job.id), Job.as_json, live.now.server.sse_comment_s)

    async def begun(job: Job, stream: bool | None) -> Response | tuple[dict[str, Any], int]:
        await jobs.saved()
        return follow(job) if stream else (job.as_json(), 202)

    @routes.post("/admin/download")
    @document_request(DownloadRequest)
    @document_response(Job, 202)
    async def download() -> Response | tuple[dict[str, Any], int]:
        """Download a model from the Hub. The same wanted twice is one job; what was fetched before is not fetched
        again. Answers with the job, 202."""
        body = await receive(DownloadRequest)
        wanted = DownloadWanted(
            body.model, body.revision or "", body.quantization or "", tuple(body.allow_patterns or ())
        )
        return await begun(jobs.download(wanted), body.stream)

    @routes.post("/admin/convert")
    @document_request(ConvertRequest)
    @document_response(Job, 202)
    async def convert() -> Response | tuple[dict[str, Any], int]:
        """Make MLX weights of a model in plain safetensors, quantised or not. Answers with the job, 202."""
        body = await receive(ConvertRequest)
        entry = descriptions.on_disk(body.model)
        if entry.problem:
            raise ModelInvalid(f"{entry.id} cannot be converted: {entry.problem}", param="model")
        if entry.format == "gguf":
            raise InvalidRequest(
                f"{entry.id} is a GGUF file, which is loaded as it is; what is converted are safetensors.",
                param="model",
            )
        wanted = ConvertWanted(entry.id, str(entry.path), body.bits, body.group_size, body.mode, body.dtype, body.name)
        return await begun(jobs.convert(wanted), body.stream)

    @routes.get("/admin/jobs")
    async def list_jobs() -> dict[str, Any]:
        """Downloads and conversions, the newest first; of those that ended the last hundred."""
        return {"jobs": [job.as_json() for job in jobs.list()]}

    @routes.get("/admin/downloads")
    async def list_downloads() -> dict[str, Any]:
        """The downloads of /admin/jobs."""
        return {"jobs": [job.as_json() for job in jobs.list() if job.kind == "download"]}

    @routes.get("/admin/jobs/<id>")
    @document_response(Job)
    async def show(id: str) -> Response | dict[str, Any]:
        """One job; with `stream=true` at each change, until it is over."""
        return follow(jobs.get(id)) if switch("stream") else jobs.get(id).as_json()

    @routes.get("/admin/downloads/<id>")
    @document_response(Job)
    async def show_download(id: str) -> Response | dict[str, Any]:
        """The same of a download."""
        job = _download(jobs.get(id))
        return follow(job) if switch("stream") else job.as_json()

    @routes.delete("/admin/jobs/<id>")
    @document_response(Job)
    async def cancel(id: str) -> dict[str, Any]:
        """Cancel a job and remove what it has fetched or made; one that is over stays as it is."""
        return (await jobs.cancel(id)).as_json()

    @routes.delete("/admin/downloads/<id>")
    @document_response(Job)
    async def cancel_download(id: str) -> dict[str, Any]:
        """The same of a download."""
        return (await jobs.cancel(_download(jobs.get(id)).id)).as_json()

    return routes


def _download(job: Job) -> Job:
    if job.kind != "download":
        raise JobNotFound(f"The job {job.id!r} is no download; it is at /admin/jobs/{job.id}.", param="id")
    return job
