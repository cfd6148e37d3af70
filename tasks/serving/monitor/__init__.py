"""The monitor's pure code: windows of live requests, who may start a retrain, and a look in words."""
