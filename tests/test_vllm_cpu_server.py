"""What scripts/vllm_cpu_server.py puts into its environment works; the servers themselves have tests/vllm_server."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "vllm_cpu_server.py"


def test_its_hook_makes_torchvision_importable(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("vllm_cpu_server", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shutil.copyfile(script.TORCHVISION_FIX, tmp_path / "_openril_torchvision_compat.py")
    (tmp_path / "_openril_torchvision_hook.py").write_text(script.HOOK)
    code = "import _openril_torchvision_hook, torch, torchvision; print(hasattr(torch.ops.torchvision, 'nms'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "True"
