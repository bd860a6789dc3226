"""Where images and labels are read from: folders, tables, CoOp's split files, captions."""
