// A conversation with a bundle on Android: docs/phone_app.md. Never compiled here; names were read in public sources.

import ai.onnxruntime.genai.*
import java.io.File
import org.json.*

/** One conversation, for one background thread; stop() from any. */
class Chat(folder: File, private val context: Int = 2048, private val most: Int = 256) : AutoCloseable {
    init { GenAI.setTelemetry(false) }
    private val model = Model(folder.path)
    private val tokenizer = Tokenizer(model)
    private val app = JSONObject(File(folder, "app.json").readText())
    private val template = File(folder, app.getString("template")).readText()
    private val tools = app.optJSONArray("tools")?.toString()
    private val ends = app.getJSONObject("stop").getJSONArray("ids").let { ids -> List(ids.length()) { ids.getInt(it) } }
    private val special = JSONObject(File(folder, "tokenizer.json").readText()).getJSONArray("added_tokens")
        .let { tokens -> List(tokens.length()) { tokens.getJSONObject(it) } }
        .filter { it.getBoolean("special") }.map { it.getString("content") }.sortedByDescending { it.length }
    private val system = if (app.isNull("system")) emptyList<JSONObject>() else listOf(message("system", app.getString("system")))
    private val messages = system.toMutableList()
    @Volatile private var stopped = false

    fun stop() { stopped = true }

    fun answer(text: String, piece: (String) -> Unit) {
        stopped = false
        messages += message("user", escaped(text))
        val first = system.size
        while (encoded().size > context - most && messages.size > first + 2) repeat(2) { messages.removeAt(first) }
        val ids = encoded()
        val said = StringBuilder()
        GeneratorParams(model).use { params ->
            params.setSearchOption("max_length", (ids.size + most).toDouble())
            params.setSearchOption("do_sample", false)
            Generator(model, params).use { generator -> tokenizer.createStream().use { stream ->
                generator.appendTokens(ids)
                while (!generator.isDone() && !stopped) {
                    generator.generateNextToken()
                    val token = generator.getLastTokenInSequence(0)
                    if (token !in ends) stream.decode(token).let { said.append(it); piece(it) }
                }
            } }
        }
        messages += message("assistant", said.toString())
    }

    private fun message(role: String, content: String) = JSONObject().put("role", role).put("content", content)

    /** A user's text, by the rule `escape` of app.json. */
    private fun escaped(text: String) =
        special.fold(text) { all, token -> all.replace(token, "${token.take(1)} ${token.drop(1)}") }

    private fun encoded(): IntArray =
        tokenizer.encode(tokenizer.applyChatTemplate(template, JSONArray(messages).toString(), tools, true))
            .use { it.getSequence(0) }

    override fun close() { tokenizer.close(); model.close() }
}
