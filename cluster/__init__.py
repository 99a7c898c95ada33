"""Ray jobs and the command line: prepare, train, generate, evaluate, report. The only room that imports ray."""
