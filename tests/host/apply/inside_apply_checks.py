"""Inside a host: every check of the ``inside_apply_*`` files that has them; ``report.json`` has "" or the
traceback for each. Reads the adapters that ``test_apply_base.py`` saved.
"""

import json
import sys

import inside_apply_base
import inside_apply_families
import inside_apply_files
import inside_apply_models
from inside_apply_lib import FOLDER, run_checks

checks = [
    check
    for script in (inside_apply_base, inside_apply_models, inside_apply_families, inside_apply_files)
    for check in script.CHECKS
]
if len(sys.argv) > 3:  # by hand: only these
    checks = [check for check in checks if check.__name__ in sys.argv[3:]]
(FOLDER / "report.json").write_text(json.dumps(run_checks(checks)), encoding="utf-8")
