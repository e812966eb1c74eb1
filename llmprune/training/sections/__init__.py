"""The sections of a training job, one file each: settings, checks, callbacks, estimate and conversion."""
