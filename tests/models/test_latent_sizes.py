import subprocess
import sys

import pytest

from vireo.errors import UserError
from vireo.models.latent_sizes import check_size


def test_both_sides_are_multiples_of_eight():
    check_size(256, 64)
    with pytest.raises(UserError, match="height=250 cannot be encoded.* such as 248 or 256"):
        check_size(250, 256)
    with pytest.raises(UserError, match="height=5 and width=20 .* such as 8 or 16 or 24"):
        check_size(5, 20)


def test_it_is_judged_without_torch():
    code = "import sys, vireo.models.latent_sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
