"""Everything that touches Megatron-core: parallel layout, model construction, weights, optimizer, checkpoints."""

import logging
import warnings

# At import Megatron warns of every optional package that is absent (TE, APEX), and of its own deprecations: nothing
# that a user of this engine can act on.
warnings.filterwarnings("ignore", module=r"megatron\.")
logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)  # announces that it is off
