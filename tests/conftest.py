"""Without a GPU the Triton kernels run in Triton's interpreter. It must be chosen before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
