"""The report of an evaluation or inference: ``report.html``, and what the log says."""
