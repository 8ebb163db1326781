"""A camera that speaks RTSP, for the tests, by GStreamer; run with the system's own Python, which has its bindings.

    /usr/bin/python3 tests/rtsp_camera.py PORT

Its picture is of one shade, 128 of 255. It says on which address it can be reached.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

Gst.init(None)
camera = GstRtspServer.RTSPMediaFactory()
camera.set_launch(
    "( videotestsrc is-live=true pattern=solid-color foreground-color=0xff808080"
    " ! video/x-raw,format=I420,width=64,height=48,framerate=25/1 ! jpegenc quality=95 ! rtpjpegpay name=pay0 )"
)
camera.set_shared(True)
server = GstRtspServer.RTSPServer(service=sys.argv[1], address="127.0.0.1")
server.get_mount_points().add_factory("/line", camera)
if not server.attach(None):
    sys.exit("The port is taken.")
print(f"rtsp://127.0.0.1:{server.get_bound_port()}/line", flush=True)
GLib.MainLoop().run()
