"""The report: what a run's files hold, as one page.

    run folders --run_reader--> columns and events --page_data--> plain data, thinned --html_page--> one HTML file
                                                                                      --figures--> one PNG per figure
                                                                                      --server--> a live page

A page makes no requests: data, script and style are all in it. If a run's file is missing, half written or damaged, the
page shows what there is and says what it could not read. Nothing here imports torch.
"""
