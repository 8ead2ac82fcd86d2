"""A bucket in memory that speaks as Google's: gcp-storage-emulator, and what it leaves out.

    python tests/bucket_server.py PORT [FAIL_EVERY]

Here a write or removal may ask for the generation that is replaced, and a read says which it is. An
object can be moved, and keeps a last byte that is a carriage return. In the bucket `denied` nobody
may do anything. Every FAIL_EVERY-th read answers that it is busy.
"""

import itertools
import socketserver
import sys
from email.parser import BytesParser
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects

numbers = itertools.count(1)
fail_every = int(sys.argv[2]) if len(sys.argv) > 2 else 0


def _generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def _faithful(handler):
    def handle(request, response, storage, *rest, **more):
        bucket = request.params["bucket_name"]
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        wanted = request.query.get("ifGenerationMatch")
        reads = request.query.get("alt") == ["media"] or handler is objects_download
        if bucket == "denied":
            response.status = HTTPStatus.FORBIDDEN
        elif wanted and wanted[0] != _generation(storage, bucket, name):
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif reads and fail_every and next(numbers) % fail_every == 0:
            response.status = HTTPStatus.SERVICE_UNAVAILABLE
        else:
            handler(request, response, storage, *rest, **more)
            if reads:
                response["x-goog-generation"] = _generation(storage, bucket, name)

    return handle


objects_download = objects.download
for module, names in (
    (objects, ("download", "get", "ls", "insert", "delete", "copy", "rewrite", "patch")),
    (buckets, ("get",)),
):
    for name in names:
        setattr(module, name, _faithful(getattr(module, name)))

# It looks the handlers up when it is imported.
from gcp_storage_emulator import server  # noqa: E402


def move(request, response, storage, *rest, **more):
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage, *rest, **more)
    if response.status == HTTPStatus.OK:
        objects.delete(request, response, storage, *rest, **more)


class Parser(BytesParser):
    """gcsfs ends the parts of an upload with a line feed; after a carriage return, which is the
    content's last byte, both would be taken for the end."""

    def parsebytes(self, text, headersonly=False):
        return super().parsebytes(text.replace(b"\n--==0==", b"\r\n--==0=="), headersonly)


server.BytesParser = Parser

# Its answer to what it doesn't know would be taken for a failure that is worth half a minute of
# asking again.
PATH = r".*/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"
server.HANDLERS = ((PATH, {server.POST: move}), *server.HANDLERS)

# A client opens more connections at once than the usual 5 that may wait. What is turned away then
# waits for minutes.
socketserver.TCPServer.request_queue_size = 128
server.create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
