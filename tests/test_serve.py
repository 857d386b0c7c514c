"""The page of `sslvit serve`, asked over a real socket."""

import base64
import http.client
import io
import json
import threading

import pytest
from PIL import Image
from tiny_vlm import session_root, tiny_run

from sslvit.errors import InputError
from sslvit.verbs.ask import ask
from sslvit.verbs.serve import make_server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(session_root(tmp_path_factory))


@pytest.fixture(scope="module")
def port(run):
    server = make_server(run, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "purple").save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def send(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    answer = reply.status, reply.read().decode(), reply.headers
    connection.close()
    return answer


def test_the_page_needs_no_network(port):
    status, page, _ = send(port, "GET", "/")
    assert status == 200 and "<!doctype html>" in page
    assert "http://" not in page and "https://" not in page and 'src="' not in page


def test_answers_stream_and_are_those_of_ask(run, port, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture)
    body = json.dumps({"image": data_url(picture), "question": "Describe the image."})
    status, text, headers = send(port, "POST", "/ask", body)
    assert status == 200 and headers["Transfer-Encoding"] == "chunked"
    assert text.strip() == ask(run, image=tmp_path / "a.png", question="Describe the image.")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "expected"),
        ("[]", "expected"),
        (json.dumps({"image": "data:,%%%", "question": "?"}), "expected"),
        (json.dumps({"image": 3, "question": "?"}), "expected"),
        (json.dumps({"image": data_url(b"nothing"), "question": "?"}), ""),
        (json.dumps({"image": data_url(b"x"), "question": " "}), "empty"),
        ("", "length"),
    ],
)
def test_wrong_requests_are_refused_with_a_reason(port, body, reason):
    status, text, _ = send(port, "POST", "/ask", body)
    assert status == 400 and text and reason in text


def test_other_sites_and_paths_are_refused(port, picture):
    body = json.dumps({"image": data_url(picture), "question": "?"})
    assert send(port, "POST", "/ask", body, {"Origin": "http://elsewhere.example"})[0] == 403
    assert send(port, "POST", "/other", body)[0] == 403
    assert send(port, "GET", "/../secret")[0] == 404
    assert send(port, "POST", "/ask", body, {"Origin": f"http://127.0.0.1:{port}"})[0] == 200


def test_too_large_requests_are_not_read(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/ask")
    connection.putheader("Content-Length", str(10**10))
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


def test_a_taken_port_is_one_line(run, port):
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"):
        make_server(run, "127.0.0.1", port)
