"""Settings every test runs under."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports tensorflow
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["ONNXPRUNE_CACHE"] = ""  # no times of layers are left in the user's folders
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job hands that on to every process
    signal.signal(signal.SIGINT, signal.default_int_handler)
