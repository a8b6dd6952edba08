"""``prunetool upload``."""

from pathlib import Path

import click

from prunetool import console, options


@click.command(cls=options.Command)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--private", is_flag=True, help="Make a repository that nobody else can see.")
@click.option(
    "--revision",
    metavar="BRANCH",
    help="Upload to this branch; created if missing, but not with --create-pr.",
)
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded, offline.")
@click.option(
    "--metrics",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Put this result of evaluate into the model card; the text is named after the file. "
    "May be given several times.",
)
@options.overwrite_opt("another checkpoint in REPO")
def upload(
    out: Path,
    repository: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    dry_run: bool,
    metrics: tuple[Path, ...],
    overwrite: bool,
) -> None:
    """Put the checkpoint OUT on the Hub as REPO (OWNER/NAME).

    OUT is what export wrote, unchanged, but README.md may be edited and a LICENSE or NOTICE added.
    Nothing else is uploaded. REPO is created if missing. If killed, the same command sends the
    rest. The token comes from HF_TOKEN or `hf auth login`. The address goes to stdout.

    \b
    Example:
      prunetool upload SmolLM2-pruned me/SmolLM2-pruned --dry-run
      prunetool upload SmolLM2-pruned me/SmolLM2-pruned --metrics wikitext-2.json
    """
    from prunetool.checkpoint.hub import HUB_ID, without_secrets
    from prunetool.errors import HubError
    from prunetool.steps import upload as step

    if not HUB_ID.fullmatch(repository):
        name = without_secrets(repository)
        raise HubError(name, "is not an id of the Hub", "give OWNER/NAME, such as me/tiny-pruned")
    with console.summary("upload") as said:
        files = step.contents(out, repository, metrics)
        total = sum(map(step.size_bytes, files.values()))
        step.say_licence(out, repository, list(files))
        said += [f"{console.counted(len(files), 'file')}, {total / 1e6:,.1f} MB"]
        if dry_run:
            for name, content in files.items():
                click.echo(f"{step.size_bytes(content):>15,}  {name}")
            said += [f"nothing sent to {repository}"]
            return
        done = step.upload(
            files,
            repository,
            private=private,
            revision=revision,
            create_pr=create_pr,
            overwrite=overwrite,
        )
        click.echo(done.url)
        said += [f"{'in' if done.changed else 'already in'} {repository}"]
    if create_pr:
        return
    at = f" --revision {revision}" if revision else ""
    console.log.info("Next: prunetool evaluate %s%s --text TEXT", repository, at)
