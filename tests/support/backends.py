"""The backends that the tests of an op are run on."""

import pytest

from fastdit.kernels import library

BACKENDS = ["triton", pytest.param("cpp", marks=pytest.mark.skipif(not library.EXTENSION, reason="the C++ extension is not built"))]
