"""Inside a host: every check of the ``inside_apply_*`` files that has them; ``report.json`` has "" or the
traceback for each. Reads the adapters that ``test_apply_base.py`` saved.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import inside_apply_base
import inside_apply_models
from inside_apply_lib import FOLDER, run_checks

checks = [*inside_apply_base.CHECKS, *inside_apply_models.CHECKS]
(FOLDER / "report.json").write_text(json.dumps(run_checks(checks)), encoding="utf-8")
