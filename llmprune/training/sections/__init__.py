"""The sections of a training job, one file each: checks, callbacks, estimate and conversion."""
