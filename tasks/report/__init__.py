"""What a run leaves for people: `verdict.json`, `report.html`, and the verdict in terminal and run page."""
