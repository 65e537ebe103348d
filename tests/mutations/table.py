"""All deliberate bugs."""

from mutations.chat_bugs import CHAT_BUGS
from mutations.data_bugs import DATA_BUGS
from mutations.decode_bugs import DECODE_BUGS
from mutations.decode_kernel_bugs import DECODE_KERNEL_BUGS
from mutations.export_bugs import EXPORT_BUGS
from mutations.generation_bugs import GENERATION_BUGS
from mutations.gpu_bugs import GPU_BUGS
from mutations.kernel_bugs import KERNEL_BUGS
from mutations.model_bugs import MODEL_BUGS
from mutations.quiet_bugs import QUIET_BUGS
from mutations.report_bugs import REPORT_BUGS
from mutations.training_bugs import TRAINING_BUGS

MUTATIONS = (
    *KERNEL_BUGS,
    *DECODE_KERNEL_BUGS,
    *MODEL_BUGS,
    *GENERATION_BUGS,
    *CHAT_BUGS,
    *TRAINING_BUGS,
    *DECODE_BUGS,
    *DATA_BUGS,
    *EXPORT_BUGS,
    *QUIET_BUGS,
    *REPORT_BUGS,
    *GPU_BUGS,
)
