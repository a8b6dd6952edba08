"""Files and bytes: no architecture, no mathematics."""
