"""A command for --latency-command: takes an ONNX file, prints the milliseconds of one forward pass as its last line.

    nas-kd study --budget latency=50% --latency-command "python examples/device_latency.py"

Here it times ONNX Runtime on this machine.
For a phone, let `milliseconds` say what your runtime's benchmark prints, e.g.

    adb push MODEL.onnx /data/local/tmp/
    adb shell /data/local/tmp/onnxruntime_perf_test -I -r 50 -x 1 /data/local/tmp/MODEL.onnx

and read the average out of its output (`subprocess.run(..., capture_output=True)`).
"""

import sys
import time

import numpy as np
import onnxruntime

RUNS, WARM_UP = 30, 5


def milliseconds(path: str) -> float:
    """The median time of one image through the network, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    (image,) = session.get_inputs()
    shape = [length if isinstance(length, int) else 1 for length in image.shape]
    feed = {image.name: np.zeros(shape, np.float32)}
    times = []
    for _ in range(WARM_UP + RUNS):
        begin = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - begin)
    return 1000 * float(np.median(times[WARM_UP:]))


if __name__ == "__main__":
    print(milliseconds(sys.argv[-1]))
