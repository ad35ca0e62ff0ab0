"""What GPUs have to do as the CPU does, and what it costs there: `make gpu-check`. Nothing here needs a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
