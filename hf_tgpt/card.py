def replace_empty_card(folder, config):
    pass
