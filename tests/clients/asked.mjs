// What the JavaScript clients ask for; the Python test hands it over as JSON.

export const { ASKED, EMBED, IMAGE, MODEL, SCHEMA, TOOL, TOOLED } = JSON.parse(process.argv[3]);
