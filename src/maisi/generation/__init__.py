"""From a request to volumes: the pipeline, the field-of-view adviser."""
