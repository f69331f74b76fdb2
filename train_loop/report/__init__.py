"""The report: what a run's files hold, as one page to look at.

    run folders --files--> columns and events --gather--> plain data, thinned --page--> one HTML file
                                                                              --figures--> a PNG a figure
                                                                              --server--> the page, renewed as it grows

A page makes no request to anywhere: data, script and style are in it. Whatever file of a run is missing, half written
or damaged, the page shows what there is and says what it could not read. Nothing here imports torch.
"""
