"""The plumbing: what nobody needs to open to understand an algorithm. docs/architecture.md has the map."""

import transformers.utils

# kernels/ shadows Hugging Face's package of that name. Where that one is installed as well, transformers would look for
# its contents in ours and fail to import, so it is told, before anything else of it is imported, that there is none.
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_, **__: False
transformers.utils.logging.disable_progress_bar()
