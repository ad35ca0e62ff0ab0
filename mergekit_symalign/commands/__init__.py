"""The commands of ``mergekit-symalign``, one module each."""
