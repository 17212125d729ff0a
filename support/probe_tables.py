"""What linprobe.py prints at its end: the grid of heads, and several sources side by side."""


def grid_of_heads(source, table, best, paper):
    """A line per layer, a column per read-out and norm, in each place the top-1 in percent.

    table: a row per layer, read-out and norm, in this order. best, paper: two of them.
    """
    titles = dict.fromkeys(f"{row['readout']}/{row['norm']}" for row in table)
    lines = [f"{source:10}" + "".join(f"{title:>18}" for title in titles)]
    block = None
    for row in table:
        if row["block"] != block:
            block = row["block"]
            lines.append(f"{block:>10}")
        marks = "*" * (row is best) + "p" * (row is paper)
        lines[-1] += f"{row['top1']:>16.1f}{marks:2}"
    lines += [
        f"  * chosen on held-out training images: top-1 {best['top1']:.2f}, "
        f"top-5 {best['top5']:.2f} (rate {best['rate']:g}, weight decay {best['weight_decay']:g})",
        f"  p the paper's reading: {paper['top1']:.2f}"]
    return "\n".join(lines)


def sources_compared(summaries):
    """A line per source: the chosen head, the paper's reading, k-NN."""
    lines = [f"{'source':>10} {'top-1':>7} {'paper':>7} {'k-NN':>7}   chosen"]
    for r in summaries:
        lines.append(f"{r['source']:>10} {r['top1']:7.2f} {r['paper_top1']:7.2f} {r['knn']:7.2f}   "
                     f"block {r['block']}, {r['readout']}, {r['norm']}")
    return "\n".join(lines)
