"""An emulated Google Cloud Storage with the bucket "tests", for this process and its children."""

import contextlib
import logging
from http import HTTPStatus

import pytest

REASON = "needs pip install gcp-storage-emulator"


def with_generations(download):
    """Answer downloads as Google does: the emulator neither sends nor compares the generation of an object."""

    def answer(request, response, storage, *arguments, **options):
        download(request, response, storage, *arguments, **options)
        if response.status == HTTPStatus.NOT_FOUND:
            return
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]
        if request.query.get("ifGenerationNotMatch") == [found["generation"]]:
            response.status = HTTPStatus.NOT_MODIFIED
            response.write_file(b"", None)

    return answer


@contextlib.contextmanager
def emulated_bucket():
    """Run the server in a thread; yields its storage. Skips the test if the emulator is not installed."""
    create_server = pytest.importorskip("gcp_storage_emulator.server", reason=REASON).create_server
    from gcp_storage_emulator.handlers import objects

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "download", with_generations(objects.download))
        server = create_server("127.0.0.1", 0, True, default_bucket="tests")
        server.start()
        server._api._httpd.handle_error = lambda *_: None  # clients that close their connection early
        url = "http://{}:{}".format(*server._api._httpd.server_address)
        # gcsfs asks Google for the type of a bucket unless told not to, which it reads when it is imported.
        environment = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "NO_GCE_CHECK": "true"}
        environment["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        for name, value in environment.items():
            patch.setenv(name, value)
        pytest.importorskip("gcsfs", reason="needs pip install gcsfs")
        yield server._storage
        server.stop()
