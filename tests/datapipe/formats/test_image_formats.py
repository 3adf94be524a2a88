"""Only listed formats are opened, by content: nothing that refers to other files or the network, or runs programs."""

import io
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from datapipe.core.config import ShardConfig
from datapipe.core.errors import DataError
from datapipe.formats.image_formats import FORMATS, is_known
from datapipe.ingest.screen import Refused, screen
from datapipe.views.decode import decode
from tests.datapipe.sources.read_source import crops
from training.reid.colour_histogram import _rgb
from training.reid.embed import decode as embed_decode


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port of this machine that nobody is to ask."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def film(path: Path, codec: str = "mpeg4", kind: str | None = None) -> bytes:
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(4):
            frame = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def boxes(path: Path) -> None:
    path.write_text("1,1,8,8,40,30,1,1,1\n3,1,8,8,40,30,1,1,1\n")


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile other.avi\n",
    "concat-url": "ffconcat version 1.0\nfile http://127.0.0.1:{port}/x.avi\n",
    "concat-absolute": "ffconcat version 1.0\nfile {folder}/other.avi\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
    "hls-local": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.ts\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
            'bandwidth="1"><BaseURL>http://127.0.0.1:{port}/x.mp4</BaseURL></Representation></AdaptationSet></Period>'
            "</MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
           "a=rtpmap:96 H264/90000\n",
    "asx": '<asx version="3.0"><entry><ref href="http://127.0.0.1:{port}/a"/></entry></asx>',
}  # fmt: skip


@pytest.mark.parametrize("ending", ["mp4", "avi", "ts"])
def test_video__that_is_a_playlist_is_refused_and_nothing_it_names_is_read(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    film(tmp_path / "other.avi")
    film(tmp_path / "other.ts", kind="mpegts")
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    boxes(tmp_path / "set" / "x.txt")
    path = tmp_path / "set" / f"x.{ending}"
    for text in PLAYLISTS.values():
        path.write_text(text.format(port=listener.getsockname()[1], folder=tmp_path))
        with pytest.raises(DataError, match="a playlist perhaps, which is not followed") as caught:
            crops(str(path))
        assert caught.value.where == str(path)
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_video__is_told_by_its_content_not_by_its_name(tmp_path: Path) -> None:
    made = {
        "mp4": film(tmp_path / "a.mp4"), "avi": film(tmp_path / "a.avi"), "mkv": film(tmp_path / "a.mkv"),
        "mov": film(tmp_path / "a.mov"), "ts": film(tmp_path / "a.ts", kind="mpegts"),
        "mpg": film(tmp_path / "a.mpg", "mpeg2video", "mpeg"), "flv": film(tmp_path / "a.flv", "flv"),
        "wmv": film(tmp_path / "a.wmv", "wmv2", "asf"), "webm": film(tmp_path / "a.webm", "libvpx"),
    }  # fmt: skip
    (tmp_path / "set").mkdir()
    boxes(tmp_path / "set" / "x.txt")
    for kind, data in made.items():
        (tmp_path / "set" / "x.mp4").write_bytes(data)
        assert [crop.frame for crop in crops(f"{tmp_path}/set/x.mp4")] == [1, 3], kind
    (tmp_path / "set" / "x.mp4").write_bytes(film(tmp_path / "a.nut", "ffv1"))
    with pytest.raises(DataError, match="none of the formats mov"):
        crops(f"{tmp_path}/set/x.mp4")


def eps(touched: Path) -> bytes:
    return (f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n({touched}) (w) file closefile\n"
            "showpage\n%%EOF\n").encode()  # fmt: skip


def test_images__of_other_formats_run_nothing_and_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*words: object, **_: object) -> None:
        raise AssertionError(f"{words} was run")

    monkeypatch.setattr(subprocess, "Popen", never)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    picture, sink = Image.new("RGB", (64, 64)), io.BytesIO()
    picture.save(sink, "ICO")
    for data in (eps(tmp_path / "ran"), sink.getvalue(), b"\xd7\xcd\xc6\x9a" + bytes(100), b"", b"text"):
        assert isinstance(screen(data, ShardConfig()), Refused)
        with pytest.raises(ValueError, match="not an image"):
            decode(data)
        with pytest.raises(DataError):
            embed_decode(data, "x.jpg")
        with pytest.raises(DataError, match="an image cannot be decoded"):
            _rgb(data)


def test_images__of_listed_formats_are_known_by_their_first_bytes() -> None:
    for kind in FORMATS:
        sink = io.BytesIO()
        Image.new("RGB", (9, 7)).save(sink, kind)
        assert is_known(sink.getvalue()) and decode(sink.getvalue()).shape == (7, 9, 3)
