"""One file a flow, each readable from top to bottom as the DAG."""
